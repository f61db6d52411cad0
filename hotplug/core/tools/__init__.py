"""What looks at engines: bisection, simulation, timelines."""
