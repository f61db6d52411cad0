"""The performance history of hotplug's commits: what is measured, kept, judged and shown."""
