"""Publishing on the Hub: what goes up, and its card."""
