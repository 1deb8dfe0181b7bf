"""Webhooks: signed messages about jobs, sent from an outbox to addresses that were checked."""
