"""What a run costs before it is started: memory, arithmetic, communication and time, each from stated formulas."""
