"""Files and batches of the double: resumable upload, batch create, get and list, download of results."""

from __future__ import annotations

import json
import re
import threading
from typing import TYPE_CHECKING, Any

from fasttrain_data.gemini_double.replies import Body, error_body

if TYPE_CHECKING:
    from fasttrain_data.gemini_double.server import GeminiDouble

_START = re.compile(r"/upload/(?:v1|v1beta)/files")
_UPLOAD = re.compile(r"/uploads/(\d+)")
_CREATE = re.compile(r"/(?:v1|v1beta)/models/([^/:]+):batchGenerateContent")
_BATCH = re.compile(r"/(?:v1|v1beta)/batches(?:/([\w-]+))?")
_DOWNLOAD = re.compile(r"/(?:download/)?(?:v1|v1beta)/files/([\w-]+):download")


class BatchStore:
    """What was uploaded and submitted. A batch is worked through when it has been asked for `polls` times."""

    def __init__(self, double: GeminiDouble, polls: int) -> None:
        self._double, self._polls = double, polls
        self._lock = threading.Lock()
        self.files: dict[str, bytes] = {}
        self.jobs: dict[str, Body] = {}
        self.created = 0

    def post(self, path: str, raw: bytes, headers: Any) -> tuple[int, Any, dict[str, str]] | None:
        """Reply to a POST of a file or batch route; None for any other path."""
        with self._lock:
            if _START.fullmatch(path):
                number = len(self.files) + 1
                self.files[f"file-{number}"] = b""
                return 200, {}, {"X-Goog-Upload-URL": f"{self._double.url}/uploads/{number}"}
            if match := _UPLOAD.fullmatch(path):
                return self._receive(f"file-{match[1]}", raw, headers)
            if match := _CREATE.fullmatch(path):
                return self._create(match[1], json.loads(raw))
        return None

    def get(self, path: str, query: str) -> tuple[int, Any] | None:
        if match := _DOWNLOAD.fullmatch(path):
            content = self.files.get(match[1])
            return (404, error_body(404, "NOT_FOUND", "no such file")) if content is None else (200, content)
        if match := _BATCH.fullmatch(path):
            if match[1] is None:
                return 200, {"operations": [self._shown(job) for job in self.jobs.values()]}
            job = self.jobs.get(match[1])
            if job is None:
                return 404, error_body(404, "NOT_FOUND", "no such batch")
            return 200, self._polled(job)
        return None

    def _receive(self, name: str, raw: bytes, headers: Any) -> tuple[int, Any, dict[str, str]]:
        self.files[name] += raw
        if "finalize" not in (headers.get("X-Goog-Upload-Command") or ""):
            return 200, {}, {"X-Goog-Upload-Status": "active"}
        file = {"name": f"files/{name}", "sizeBytes": str(len(self.files[name])), "state": "ACTIVE"}
        return 200, {"file": file}, {"X-Goog-Upload-Status": "final"}

    def _create(self, model: str, body: Body) -> tuple[int, Any, dict[str, str]]:
        batch = body["batch"]
        config = batch.get("inputConfig", batch.get("input_config"))
        name = config.get("fileName", config.get("file_name", "")).removeprefix("files/")
        if name not in self.files:
            return 404, error_body(404, "NOT_FOUND", f"no file {name}"), {}
        self.created += 1
        job = {
            "id": f"batch-{self.created}",
            "model": model,
            "display_name": batch.get("displayName", batch.get("display_name", "")),
            "input": name,
            "state": "BATCH_STATE_PENDING",
            "polls": 0,
        }
        self.jobs[job["id"]] = job
        return 200, self._shown(job), {}

    def _polled(self, job: Body) -> Body:
        with self._lock:
            job["polls"] += 1
            if job["state"] in ("BATCH_STATE_PENDING", "BATCH_STATE_RUNNING"):
                done = job["polls"] > self._polls
                job["state"] = "BATCH_STATE_SUCCEEDED" if done else "BATCH_STATE_RUNNING"
                if done:
                    self._work(job)
            return self._shown(job)

    def _work(self, job: Body) -> None:
        """Results line by line, in the order of the requests; a transport fault is that row's error."""
        lines = []
        for line in self.files[job["input"]].decode().splitlines():
            row = json.loads(line)
            reply = self._double.answer(row["request"], job["model"], "batch", linger=False)
            if reply is None:
                result: Body = {"error": {"code": 4, "message": "deadline exceeded"}}
            elif reply[0] != 200 or not isinstance(reply[1], dict):
                body = (
                    reply[1]
                    if isinstance(reply[1], dict)
                    else error_body(reply[0], "INTERNAL", "bad gateway")
                )
                result = {"error": body["error"]}
            else:
                result = {"response": reply[1]}
            lines.append(json.dumps({"key": row["key"], **result}))
        job["output"] = f"{job['id']}-output"
        self.files[job["output"]] = ("\n".join(lines) + "\n").encode("utf-8", "surrogatepass")

    def _shown(self, job: Body) -> Body:
        metadata = {
            "@type": "type.googleapis.com/google.ai.generativelanguage.v1main.GenerateContentBatch",
            "model": f"models/{job['model']}",
            "displayName": job["display_name"],
            "state": job["state"],
            "name": f"batches/{job['id']}",
        }
        if "output" in job:
            metadata["output"] = {"responsesFile": f"files/{job['output']}"}
        return {"name": f"batches/{job['id']}", "metadata": metadata, "done": "output" in job}
