"""Tables and figures made from records alone, without torch."""
