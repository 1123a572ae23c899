"""The parts that routers are made of: score × select × weigh × capacity, and noise."""
