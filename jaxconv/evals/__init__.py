"""How a result is measured: statistics over independent units, and the report they stand in."""
