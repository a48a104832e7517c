"""Which gateway writes an answer, and when each gateway was last seen."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    op.create_table(
        "gateways",
        sa.Column("id", sa.String(32), primary_key=True),
        sa.Column("seen", sa.Float, nullable=False),
    )
    op.add_column("messages", sa.Column("writer", sa.String(32)))


def downgrade() -> None:
    op.drop_column("messages", "writer")
    op.drop_table("gateways")
