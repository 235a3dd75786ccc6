"""The parts that models are made of; nothing here knows a single architecture."""
