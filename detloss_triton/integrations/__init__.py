"""Our losses inside other libraries' models; none of these is imported here."""
