"""What wheels carry besides the package; an editable install reads the repository's own."""

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

CARRIED = {"data": "x3mat/data", "book/_static/vendor/3dmol": "x3mat/assets/3dmol"}


class CarryHook(BuildHookInterface):
    def initialize(self, version, build_data):
        if version == "standard":
            build_data["force_include"].update(CARRIED)
