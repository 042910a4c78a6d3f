// SPDX-License-Identifier: Apache-2.0
#pragma once

namespace alambic {

/// Gives processor tensors heaps of their own, which keep what is freed. A training step frees and asks for the same large
/// tensors over and over; given back to the system, each costs its page faults again (a tenth to a third of a step on two
/// cores), and glibc's aligned malloc does not fit a tensor into the place that one of its size has left, so that its heap is a
/// quarter larger. Called once, at the start of a program that trains. Bounds the kernels that oneDNN keeps, too: each shape
/// of a product that it has seen holds memory, and in its 1,024 places a long run with rows of many lengths would collect gigabytes.
void use_tensor_heaps();

/// While one lives, tensors that its thread makes come from a second heap, for what a step keeps from its forward to its
/// backward pass: among short-lived ones they would fill holes in part. They are freed wherever and whenever. Without
/// use_tensor_heaps() it does nothing.
class KeptTensors {
 public:
  explicit KeptTensors(bool active = true);
  ~KeptTensors();
  KeptTensors(const KeptTensors&) = delete;
  KeptTensors& operator=(const KeptTensors&) = delete;

 private:
  int before_;
};

/// While one lives, tensors that its thread makes come from wherever freed memory has room for them, and from the second heap where none has: for
/// gradients that stay until the optimiser takes them. They take the places of what their pass has given back, the highest first, and of the logits before it.
class TensorsUntilTheOptimiser {
 public:
  TensorsUntilTheOptimiser();
  ~TensorsUntilTheOptimiser();
  TensorsUntilTheOptimiser(const TensorsUntilTheOptimiser&) = delete;
  TensorsUntilTheOptimiser& operator=(const TensorsUntilTheOptimiser&) = delete;

 private:
  int before_;
};

}  // namespace alambic
