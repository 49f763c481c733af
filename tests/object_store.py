"""A stand-in for Google Cloud Storage: one set of objects behind the part of its JSON API that
TensorStore speaks, and an fsspec file system `gs` in place of gcsfs's, which asks the same server.

Like the real thing it has objects and no folders, and neither renames nor appends.

`python tests/object_store.py <launch arguments>` runs `jaxconv.launch` with that file system.
"""

import io
import json
import os
import sys
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import fsspec

_ADDRESS = "TENSORSTORE_GCS_HTTP_URL"


class Objects:
    """Content and number of the last write of each object, by `bucket/name`."""

    def __init__(self):
        self.lock = threading.Lock()
        self.content: dict[str, tuple[bytes, int]] = {}
        self.writes = 0

    def put(self, name: str, content: bytes) -> int:
        with self.lock:
            self.writes += 1
            self.content[name] = content, self.writes
            return self.writes

    def names(self, prefix: str = "") -> list[str]:
        with self.lock:
            return sorted(name for name in self.content if name.startswith(prefix))


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    objects: Objects

    def log_message(self, *_) -> None:
        pass

    def _answer(self, status: int, body: bytes = b"", **headers: object) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _asked(self) -> tuple[str, str, dict[str, str]]:
        """(bucket, object or "", query)"""
        url = urllib.parse.urlsplit(self.path)
        query = {k: v[0] for k, v in urllib.parse.parse_qs(url.query).items()}
        parts = [urllib.parse.unquote(part) for part in url.path.strip("/").split("/")]
        at = parts.index("b") if "b" in parts else len(parts)
        return "".join(parts[at + 1 : at + 2]), "/".join(parts[at + 3 :]), query

    def do_POST(self) -> None:
        bucket, _, query = self._asked()
        content = self.rfile.read(int(self.headers["Content-Length"]))
        name = f"{bucket}/{query['name']}"
        known = self.objects.content.get(name, (b"", 0))
        if int(query.get("ifGenerationMatch", known[1])) != known[1]:
            return self._answer(412)
        generation = self.objects.put(name, content)
        about = {"name": query["name"], "size": str(len(content)), "generation": str(generation)}
        return self._answer(200, json.dumps(about).encode())

    def do_GET(self) -> None:
        bucket, name, query = self._asked()
        if not bucket:
            return self._answer(404)  # asks for credentials, say
        if not name:
            return self._list(bucket, query)
        found = self.objects.content.get(f"{bucket}/{name}")
        if found is None:
            return self._answer(404)
        content, generation = found
        if query.get("ifGenerationNotMatch") == str(generation):
            return self._answer(304)
        if query.get("ifGenerationMatch", str(generation)) != str(generation):
            return self._answer(412)
        about = {"x_goog_generation": generation}
        if "Range" not in self.headers:
            return self._answer(200, content, **about)
        first, _, last = self.headers["Range"].removeprefix("bytes=").partition("-")
        end = min(int(last) + 1, len(content)) if last else len(content)
        about["Content_Range"] = f"bytes {first}-{end - 1}/{len(content)}"
        return self._answer(206, content[int(first) : end], **about)

    def _list(self, bucket: str, query: dict[str, str]) -> None:
        items = []
        for full in self.objects.names(f"{bucket}/{query.get('prefix', '')}"):
            name, (content, generation) = full.partition("/")[2], self.objects.content[full]
            if name < query.get("startOffset", ""):
                continue
            if "endOffset" in query and name >= query["endOffset"]:
                continue
            size = str(len(content))
            items.append({"name": name, "size": size, "generation": str(generation)})
        self._answer(200, json.dumps({"items": items}).encode())

    def do_DELETE(self) -> None:
        bucket, name, _ = self._asked()
        with self.objects.lock:
            gone = self.objects.content.pop(f"{bucket}/{name}", None)
        self._answer(204 if gone else 404)


@contextmanager
def serving() -> Iterator[tuple[Objects, dict[str, str]]]:
    """(the objects, what the environment of a process must have to find them)"""
    objects = Objects()
    handler = type("Handler", (_Handler,), {"objects": objects})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    address = f"127.0.0.1:{server.server_port}"
    try:
        # The token keeps TensorStore from looking for credentials.
        token = {"GOOGLE_AUTH_TOKEN_FOR_TESTING": "none"}
        yield objects, {_ADDRESS: f"http://{address}", "GCE_METADATA_ROOT": address, **token}
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class Bucket(fsspec.AbstractFileSystem):
    """`gs://` by the server's API; a folder is there while objects are below it."""

    protocol = ("gs", "gcs")
    cachable = False

    def _call(self, method: str, path: str, query: dict[str, str], body: bytes | None = None):
        address = f"{os.environ[_ADDRESS]}{path}?{urllib.parse.urlencode(query)}"
        request = urllib.request.Request(address, body, method=method)
        try:
            with urllib.request.urlopen(request) as answer:
                return answer.read()
        except urllib.error.HTTPError as error:
            if error.code == 404:
                raise FileNotFoundError(path) from None
            raise

    def _parts(self, path: str) -> tuple[str, str]:
        bucket, _, name = self._strip_protocol(path).partition("/")
        return bucket, name

    def _objects(self, path: str) -> dict[str, dict]:
        bucket, name = self._parts(path)
        found = json.loads(self._call("GET", f"/storage/v1/b/{bucket}/o", {"prefix": name}))
        return {
            f"{bucket}/{item['name']}": {
                "name": f"{bucket}/{item['name']}",
                "size": int(item["size"]),
                "type": "file",
                "generation": item["generation"],
            }
            for item in found["items"]
            if not name or item["name"] == name or item["name"].startswith(f"{name}/")
        }

    def info(self, path, **_):
        path = self._strip_protocol(path)
        found = self._objects(path)
        if path in found:
            return found[path]
        if found or "/" not in path:
            return {"name": path, "size": 0, "type": "directory"}
        raise FileNotFoundError(path)

    def ls(self, path, detail=True, **_):
        path = self._strip_protocol(path)
        entries: dict[str, dict] = {}
        found = self._objects(path)
        if not found:
            raise FileNotFoundError(path)
        for name, about in found.items():
            first, slash, _ = name.removeprefix(path).lstrip("/").partition("/")
            if name == path:
                entries[name] = about
            elif slash:
                folder = f"{path}/{first}"
                entries[folder] = {"name": folder, "size": 0, "type": "directory"}
            else:
                entries[name] = about
        return list(entries.values()) if detail else sorted(entries)

    def _open(self, path, mode="rb", **_):
        bucket, name = self._parts(path)
        if mode == "rb":
            quoted = urllib.parse.quote(name, safe="")
            query = {"alt": "media"}
            place = f"/storage/v1/b/{bucket}/o/{quoted}"
            return io.BytesIO(self._call("GET", place, query))
        if mode not in ("wb", "xb"):
            raise ValueError(f"mode {mode!r}: objects are written whole")
        return _Upload(self, bucket, name)

    def rm_file(self, path):
        bucket, name = self._parts(path)
        self._call("DELETE", f"/storage/v1/b/{bucket}/o/{urllib.parse.quote(name, safe='')}", {})

    _rm = rm_file

    def rm(self, path, recursive=False, maxdepth=None):
        for name in list(self._objects(path)) if recursive else [path]:
            self.rm_file(name)

    def mkdir(self, path, create_parents=True, **_):
        pass

    def makedirs(self, path, exist_ok=False):
        pass

    def rmdir(self, path):
        pass

    def mv(self, *_, **__):
        raise NotImplementedError("objects cannot be renamed")

    def invalidate_cache(self, path=None):
        pass


class _Upload(io.BytesIO):
    """Becomes an object when it is closed."""

    def __init__(self, bucket_fs: Bucket, bucket: str, name: str):
        super().__init__()
        self._to = bucket_fs, bucket, name

    def close(self) -> None:
        if not self.closed:
            store, bucket, name = self._to
            query = {"uploadType": "media", "name": name}
            store._call("POST", f"/upload/storage/v1/b/{bucket}/o", query, self.getvalue())
        super().close()


def register() -> None:
    """Puts the file system in gcsfs's place."""
    from orbax.checkpoint._src.path import gcs_utils

    # Orbax asks Google's own client, which comes with gcsfs, what kind of bucket it is.
    gcs_utils.is_hierarchical_namespace_enabled = lambda path: False
    for protocol in Bucket.protocol:
        fsspec.register_implementation(protocol, Bucket, clobber=True)


if __name__ == "__main__":
    register()
    from jaxconv import launch

    sys.exit(launch.main(sys.argv[1:]))
