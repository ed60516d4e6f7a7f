"""Certified training: losses that bound the worst case over a ball, their schedules and what keeps bounds tight."""
