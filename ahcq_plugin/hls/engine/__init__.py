# SPDX-License-Identifier: Apache-2.0
"""One programmable accelerator for all matmuls of a model: descriptors, memory, compiler, simulation, cycle model."""
