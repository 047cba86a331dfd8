"""How config.json of each model family becomes the fields of a ModelConfig: one reader a family, one registry."""
