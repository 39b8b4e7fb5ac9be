"""What crosses between the two parties: packages and adapters, hostile until they were checked."""
