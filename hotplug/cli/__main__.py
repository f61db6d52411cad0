"""`python -m hotplug.cli`: the `hotplug` command where its script is not on the path."""

from hotplug.cli.start import main

if __name__ == "__main__":
    main()
