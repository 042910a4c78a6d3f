// SPDX-License-Identifier: Apache-2.0
//! Text to ids and back, by the tokenizers crate.

use crate::Result;
use std::sync::Once;
use tokenizers::models::ModelWrapper;
use tokenizers::tokenizer::{AddedToken, Tokenizer};

/// No real vocabulary comes near; a file may not make us size a table by an id it invents.
const MOST_IDS: u32 = 1 << 24;
/// Backtracking steps of one search for the next match: about a second. Oniguruma's own limit holds only for each place
/// where a match may begin, so a long text could still keep an evil pattern busy for hours.
const MOST_RETRIES: libc::c_ulong = 50_000_000;

pub struct Tokens {
    tokenizer: Tokenizer,
    vocabulary_size: u32,
}

fn in_words(error: tokenizers::Error) -> String {
    error.to_string()
}

impl Tokens {
    pub fn new(json: &[u8]) -> Result<Tokens> {
        static LIMIT: Once = Once::new();
        LIMIT.call_once(|| {
            // SAFETY: sets one number inside Oniguruma, before this library's first search.
            unsafe { onig_sys::onig_set_retry_limit_in_search(MOST_RETRIES) };
        });
        let mut tokenizer = Tokenizer::from_bytes(json).map_err(in_words)?;
        tokenizer.with_truncation(None).map_err(in_words)?;
        tokenizer.with_padding(None);
        let random = match tokenizer.get_model() {
            ModelWrapper::BPE(model) => model.dropout.is_some_and(|share| share > 0.0),
            ModelWrapper::Unigram(model) => model.alpha.is_some_and(|alpha| alpha > 0.0),
            _ => false,
        };
        if random {
            return Err("the model asks for dropout or sampling: the same text would not give the same ids".into());
        }
        let largest = tokenizer.get_vocab(true).into_values().max();
        let Some(largest) = largest else { return Err("the vocabulary is empty".into()) };
        if largest >= MOST_IDS {
            return Err(format!("the vocabulary holds the id {largest}; the most is {}", MOST_IDS - 1));
        }
        Ok(Tokens { tokenizer, vocabulary_size: largest + 1 })
    }

    /// The file's text with more tokens behind those it has, as transformers' add_tokens makes it: a token that is not special
    /// is looked for in the normalised text.
    pub fn extended(json: &[u8], tokens: &[String], special: bool) -> Result<String> {
        let fresh = || Tokenizer::from_bytes(json).map_err(in_words);
        let made = |text: &String| AddedToken::from(text.clone(), special);
        let mut tokenizer = fresh()?;
        if let Err(problem) = tokenizer.add_tokens(tokens.iter().map(made)) {
            // Which of them it was is not said: one by one, then.
            let mut slowly = fresh()?;
            for token in tokens {
                slowly.add_tokens([made(token)]).map_err(|error| format!("{token:?}: {error}"))?;
            }
            return Err(in_words(problem));
        }
        tokenizer.to_string(false).map_err(in_words)
    }

    /// The token that stands for text the vocabulary cannot spell.
    pub fn unknown_id(&self) -> Option<u32> {
        let model = serde_json::to_value(self.tokenizer.get_model()).ok()?;
        match model.get("unk_id").and_then(|id| id.as_u64()) {
            Some(id) => u32::try_from(id).ok(),
            None => self.tokenizer.token_to_id(model.get("unk_token")?.as_str()?),
        }
    }

    pub fn encode(&self, text: &str, add_special_tokens: bool, with_offsets: bool) -> Result<Vec<u32>> {
        if !with_offsets {
            let encoding = self.tokenizer.encode_fast(text, add_special_tokens).map_err(in_words)?;
            return Ok(encoding.get_ids().to_vec());
        }
        let encoding = self.tokenizer.encode(text, add_special_tokens).map_err(in_words)?;
        let mut numbers = Vec::with_capacity(3 * encoding.len());
        numbers.extend_from_slice(encoding.get_ids());
        let places = encoding.get_offsets();
        let narrow = |place: usize| u32::try_from(place).map_err(|_| String::from("the text is longer than 4 GiB"));
        for place in places {
            numbers.push(narrow(place.0)?);
        }
        for place in places {
            numbers.push(narrow(place.1)?);
        }
        Ok(numbers)
    }

    pub fn decode(&self, ids: &[u32], skip_special_tokens: bool) -> Result<String> {
        self.tokenizer.decode(ids, skip_special_tokens).map_err(in_words)
    }

    pub fn vocabulary_size(&self) -> u32 {
        self.vocabulary_size
    }

    pub fn id_of(&self, token: &str) -> Option<u32> {
        self.tokenizer.token_to_id(token)
    }

    pub fn token_of(&self, id: u32) -> Option<String> {
        self.tokenizer.id_to_token(id)
    }

    /// What decides the ids and nothing else, with sorted keys. serde_json's objects are sorted maps unless a feature
    /// that this crate does not switch on makes them keep their order; a test compares two orders.
    pub fn canonical(&self) -> Result<String> {
        let text = self.tokenizer.to_string(false).map_err(in_words)?;
        let mut value: serde_json::Value = serde_json::from_str(&text).map_err(|error| error.to_string())?;
        if let Some(object) = value.as_object_mut() {
            for key in ["version", "truncation", "padding", "decoder"] {
                object.remove(key);
            }
        }
        Ok(value.to_string())
    }
}
