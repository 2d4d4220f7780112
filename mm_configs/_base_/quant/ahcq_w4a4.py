# SPDX-License-Identifier: Apache-2.0
# Iterations of the published settings.
recipe = dict(name="ahcq", w_bits=4, a_bits=4, iterations=20000)
