"""KV cache blocks from and to elsewhere: connectors, which plugins bring."""
