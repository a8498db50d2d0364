"""Methods of Frugax as pure functions: `core` is what they share."""
