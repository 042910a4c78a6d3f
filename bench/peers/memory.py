# SPDX-License-Identifier: Apache-2.0
"""Resident memory of this process in GB (10^9): "VmHWM" the most there was, "VmRSS" what there is now."""


def resident_gb(key):
    with open("/proc/self/status", encoding="ascii") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(key + ":")) * 1024 / 1e9
