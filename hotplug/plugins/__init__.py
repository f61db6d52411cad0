"""Extensions other than platforms: packages that bring models and the ops these need.

An entry point of the group `hotplug.plugins` names a function of no arguments that returns an `Extension`.
"""
