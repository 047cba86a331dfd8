"""From the formats that users have to prompts files: one small class a format, one driver for all."""
