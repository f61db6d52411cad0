"""From a configuration to a bound plan and what an engine is made of."""
