"""Pure losses and estimators: arrays in, arrays out; no model, no recipe, no device placement.

Every loss returns `(sum, denominator, metrics)` so that the caller divides once, by the denominator
of the whole batch, however the batch was cut into micro-batches or spread over devices.
"""
