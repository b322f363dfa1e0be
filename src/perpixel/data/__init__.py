"""Pictures and masks: reading, writing, pairing, transforming."""
