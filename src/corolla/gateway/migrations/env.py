"""Alembic's entry: migrations run on the connection that `database.Database` opened."""

from __future__ import annotations

from alembic import context

from corolla.gateway.database import metadata

context.configure(connection=context.config.attributes["connection"], target_metadata=metadata, render_as_batch=True)
with context.begin_transaction():
    context.run_migrations()
