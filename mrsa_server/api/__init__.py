"""The HTTP surface: routes, bodies, frames, errors."""
