"""Ship data/ and the viewer's script inside wheels; an editable install reads the repository's."""

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class DataHook(BuildHookInterface):
    def initialize(self, version, build_data):
        if version == "standard":
            build_data["force_include"]["data"] = "x3mat/data"
            build_data["force_include"]["book/_static/vendor/3dmol"] = "x3mat/assets/3dmol"
