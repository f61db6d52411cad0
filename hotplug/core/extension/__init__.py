"""Extension points other than platforms, as the core reads them."""
