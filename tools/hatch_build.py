"""Ship data/ inside wheels as x3mat/data; an editable install reads the repository's own."""

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class DataHook(BuildHookInterface):
    def initialize(self, version, build_data):
        if version == "standard":
            build_data["force_include"]["data"] = "x3mat/data"
