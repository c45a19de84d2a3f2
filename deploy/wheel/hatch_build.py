"""Sets the platform tag of the wheel: Linux x86-64 with the C library that the programs need."""

import os

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class Platform(BuildHookInterface):
    def initialize(self, version, build_data):
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{os.environ['DYAD_WHEEL_PLATFORM']}"
