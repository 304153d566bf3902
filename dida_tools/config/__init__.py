"""Where things live, which device, and configs of live objects."""
