// SPDX-License-Identifier: Apache-2.0
// Exists so that core/pch.h is compiled once, for the target that all others reuse it from.
