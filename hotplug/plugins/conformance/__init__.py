"""The conformance kit: does a platform keep what the interface promises? See docs/conformance.md.

`hotplug conform --platform NAME`, or as tests: `pytest --pyargs hotplug.plugins.conformance --platform NAME`.
"""
