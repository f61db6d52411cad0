"""Who uses an engine: the offline and asynchronous APIs, and the text made of tokens."""
