"""Tables for a terminal (Markdown tables are in dcdit.utils.tables)."""


def columns(rows: list[list[str]]) -> str:
    """Rows of cells, padded to the width of their columns."""
    size = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(n) for cell, n in zip(row, size, strict=True)).rstrip() for row in rows)
