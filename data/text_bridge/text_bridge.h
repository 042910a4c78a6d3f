/* SPDX-License-Identifier: Apache-2.0 */
#pragma once
/* The C face of the Rust library in this folder: Hugging Face's tokenizers, minijinja and Parquet. Only tokenizer.cpp,
 * chat_template.cpp and parquet_rows.cpp include it.
 *
 * Every function that returns bool returns true on success. On false it has written one line of UTF-8 to *error, which the
 * caller frees, and has touched no other output. A Rust panic is such an error: it never leaves a function and prints
 * nothing. Text goes in as pointer and size (no terminating zero, UTF-8 unless said otherwise) and is only borrowed.
 * What comes out belongs to the caller and is given back with the free functions, which accept zeroed values. */
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef struct AlambicText {  /* not terminated by zero; data may be null when size is 0 */
  char* data;
  size_t size;
} AlambicText;
void alambic_text_free(AlambicText text);

typedef struct AlambicNumbers {
  uint32_t* data;
  size_t size;
} AlambicNumbers;
void alambic_numbers_free(AlambicNumbers numbers);

/* ---- tokenizers ---- */
typedef struct AlambicTokenizer AlambicTokenizer;

/* Reads a tokenizer.json, within 300 seconds and about a hundred times its size in memory. Its padding and truncation settings are dropped: ids are those of the whole text. */
bool alambic_tokenizer_new(const char* json, size_t json_size, AlambicTokenizer** tokenizer, AlambicText* error);
/* The text of a tokenizer.json with more tokens (a JSON list of strings), which get the ids behind those in use. */
bool alambic_tokenizer_extend(const char* json, size_t json_size, const char* tokens, size_t tokens_size, bool special, AlambicText* extended,
                              AlambicText* error);
bool alambic_tokenizer_unknown_id(const AlambicTokenizer* tokenizer, uint32_t* id); /* false: none */
void alambic_tokenizer_free(AlambicTokenizer* tokenizer);

/* Without offsets: the n ids. With offsets: 3n numbers; n ids, then where each token begins in the text, then where it
 * ends, in bytes. Safe to call from several threads. */
bool alambic_tokenizer_encode(const AlambicTokenizer* tokenizer, const char* text, size_t text_size, bool add_special_tokens,
                              bool with_offsets, AlambicNumbers* numbers, AlambicText* error);
bool alambic_tokenizer_decode(const AlambicTokenizer* tokenizer, const uint32_t* ids, size_t num_ids, bool skip_special_tokens,
                              AlambicText* text, AlambicText* error);

uint32_t alambic_tokenizer_vocabulary_size(const AlambicTokenizer* tokenizer); /* largest id + 1 */
bool alambic_tokenizer_id_of(const AlambicTokenizer* tokenizer, const char* token, size_t token_size, uint32_t* id); /* false: none */
bool alambic_tokenizer_token_of(const AlambicTokenizer* tokenizer, uint32_t id, AlambicText* token);                 /* false: none */

/* One JSON text that is equal for two tokenizers iff they give equal ids: pipeline with sorted keys, vocabulary sorted by
 * token, no padding and no truncation. */
bool alambic_tokenizer_canonical(const AlambicTokenizer* tokenizer, AlambicText* canonical, AlambicText* error);

/* ---- chat templates ---- */
/* Renders a Jinja template as transformers does. variables is a JSON object. fuel: most instructions (about 10^8 a second);
 * max_bytes: most output; time ends after 60 seconds and memory at 512 MiB and eight times the output. spans: pairs begin, end in bytes of the text that {% generation %} blocks rendered. */
bool alambic_template_render(const char* source, size_t source_size, const char* variables, size_t variables_size, uint64_t fuel,
                             uint64_t max_bytes, AlambicText* text, AlambicNumbers* spans, AlambicText* error);

/* ---- Parquet ---- */
typedef struct AlambicRows AlambicRows;

bool alambic_rows_open(const char* path, size_t path_size, AlambicRows** rows, uint64_t* num_rows, AlambicText* error);
void alambic_rows_free(AlambicRows* rows);
/* The next rows, one JSON object a line (each line ends in \n), at most max_rows and stopping after max_bytes; size 0 at the end. */
bool alambic_rows_next(AlambicRows* rows, uint64_t max_rows, uint64_t max_bytes, AlambicText* lines, AlambicText* error);

#ifdef __cplusplus
}
#endif
