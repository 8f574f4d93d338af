#!/usr/bin/env bash
# Builds the documentation site into site/. A broken link, a page without a place or a missing anchor is an error.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
export NO_MKDOCS_2_WARNING=1
exec "${PYTHON:-python}" -m mkdocs build --strict --quiet "$@"
