"""Log formats of a server: lines of text, or JSON for log collectors, with the id of the request.

Knows `logging`; not what is logged.
"""

import json
import logging
import re
import time
import uuid
from contextvars import ContextVar

FORMATS = ("text", "json")
FIELDS = ("method", "path", "status", "seconds", "client")  # passed as `extra` by the access log
VALID_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")

request_id: ContextVar[str] = ContextVar("request_id", default="-")


def set_request_id(sent: str | None) -> str:
    """Use the id that a client sent, if it is safe to log, else a new one; returns it."""
    chosen = sent if sent and VALID_ID.fullmatch(sent) else uuid.uuid4().hex[:16]
    request_id.set(chosen)
    return chosen


def configure_logging(log_format: str) -> None:
    """Format the lines of the root logger's handlers as "text" or "json"."""
    formatter = JsonFormatter() if log_format == "json" else TextFormatter()
    for handler in logging.getLogger().handlers:
        handler.setFormatter(formatter)


class TextFormatter(logging.Formatter):
    """`2026-01-31T12:00:00.123Z INFO 0a1b2c3d message`; `-` outside a request."""

    def format(self, record: logging.LogRecord) -> str:
        line = f"{_timestamp(record)} {record.levelname} {request_id.get()} {record.getMessage()}"
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


class JsonFormatter(logging.Formatter):
    """One JSON object per line: time, level, logger, request_id, message, and the fields of the
    access log.
    """

    def format(self, record: logging.LogRecord) -> str:
        fields = {
            "time": _timestamp(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "request_id": request_id.get(),
            "message": record.getMessage(),
        }
        fields |= {name: getattr(record, name) for name in FIELDS if hasattr(record, name)}
        if record.exc_info:
            fields["traceback"] = self.formatException(record.exc_info)
        return json.dumps(fields)


def _timestamp(record: logging.LogRecord) -> str:
    """UTC, ISO 8601 with milliseconds."""
    seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
    return f"{seconds}.{int(record.msecs):03d}Z"
