"""Sessions over tokens; no weights."""
