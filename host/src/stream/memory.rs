//! A stream that keeps its messages in memory: for tests.
