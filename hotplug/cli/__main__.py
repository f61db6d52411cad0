"""`python -m hotplug.cli`: the `hotplug` command where its script is not on the path."""

from hotplug.cli.main import app

if __name__ == "__main__":
    app(prog_name="hotplug")
