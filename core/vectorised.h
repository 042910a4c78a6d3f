// SPDX-License-Identifier: Apache-2.0
#pragma once
// One program for all machines: a function marked ALAMBIC_VECTORISED is compiled for AVX-512, AVX2 and plain processors, and the
// right one is chosen when the program starts. An attribute can be given in no other way than by a macro. Put it on free
// functions with plain loops; what they call must be inline. Lambdas inside are not covered.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define ALAMBIC_VECTORISED [[gnu::target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")]]
#else
#define ALAMBIC_VECTORISED
#endif
