// SPDX-License-Identifier: Apache-2.0
#include "distill/alignment.h"

#include <gtest/gtest.h>

#include <algorithm>

#include "core/json.h"
#include "core/random.h"
#include "tests/golden.h"
#include "tests/support.h"

namespace alambic::distill {
namespace {

using testing::fails_with;
using testing::golden_path;
using Numbers = std::vector<std::int64_t>;

const Json& cases() {
  static const Json golden = read_json_file(golden_path("tokenizers.json"));
  return golden["cases"];
}

// A tokenizer of tests/golden/tokenizers.json, after a change, with a model of its size.
struct Side {
  data::Tokenizer tokenizer;
  models::ModelConfig model;
  TokensOf tokens;
  std::optional<Spelling> spelling;

  explicit Side(const std::string& name, const std::function<void(Json&)>& change = {}, bool spells = true) : tokenizer(made(name, change)), model(), tokens{tokenizer, model, name} {
    model.vocabulary_size = tokenizer.vocabulary_size();
    if (spells) spelling = Spelling::of(tokenizer, name);
  }
  Side(const Side&) = delete;

  static data::Tokenizer made(const std::string& name, const std::function<void(Json&)>& change) {
    Json json = cases()[name]["tokenizer"];
    if (change) change(json);
    return data::Tokenizer::from_json(to_line(json), name);
  }
  Numbers ids(const std::string& text, bool special = false) const {
    const std::vector<std::uint32_t> ids = tokenizer.encode(text, special);
    return {ids.begin(), ids.end()};
  }
  std::string spelt(const Numbers& ids) const {
    std::string text;
    for (const std::int64_t id : ids) text += spelling->bytes_of(static_cast<std::uint32_t>(id));
    return text;
  }
};

Translation translated(const Side& student, const Side& teacher, const Numbers& ids, bool from_begin = true) {
  return Translator(student.tokens, *student.spelling, teacher.tokens, teacher.spelling ? &*teacher.spelling : nullptr).translate(ids, from_begin);
}

std::string text_of(const Side& side, const Numbers& ids, std::int64_t first, std::int64_t count) { return side.spelt({ids.begin() + first, ids.begin() + first + count}); }

TEST(Align, FindsTheFinestCommonSpans) {
  EXPECT_EQ(align(Numbers{2, 5, 7}, Numbers{2, 5, 7}), (std::vector<Span>{{0, 1, 0, 1}, {1, 1, 1, 1}, {2, 1, 2, 1}}));
  EXPECT_EQ(align(Numbers{3, 4, 9}, Numbers{1, 4, 6, 9}), (std::vector<Span>{{0, 2, 0, 2}, {2, 1, 2, 2}}));
  EXPECT_EQ(align(Numbers{3, 4}, Numbers{1, 4, 6, 9}), (std::vector<Span>{{0, 2, 0, 2}}));  // nothing of what only one side has
  EXPECT_EQ(align(Numbers{}, Numbers{1, 4}), std::vector<Span>{});
  EXPECT_EQ(align(Numbers{4}, Numbers{kNoBoundary, kNoBoundary, 4}), (std::vector<Span>{{0, 1, 0, 3}}));
  EXPECT_EQ(align(Numbers{kNoBoundary, 2}, Numbers{1, 2}), (std::vector<Span>{{0, 2, 0, 2}}));
  EXPECT_EQ(align(Numbers{2, kNoBoundary}, Numbers{2, kNoBoundary}), (std::vector<Span>{{0, 1, 0, 1}}));
}

TEST(Align, EverySpanBeginsAndEndsAtTheSameByteAndNoneCouldBeCut) {
  std::uint64_t draw = 7;
  const auto next = [&](std::uint64_t below) { return static_cast<std::int64_t>((draw = mix64(draw)) % below); };
  for (int round = 0; round < 300; ++round) {
    Numbers ends[2];
    for (Numbers& side : ends)
      for (std::int64_t end = 0; end < 40;) side.push_back(end = std::min<std::int64_t>(40, end + 1 + next(5)));
    const std::vector<Span> spans = align(ends[0], ends[1]);
    Numbers common, found;
    std::set_intersection(ends[0].begin(), ends[0].end(), ends[1].begin(), ends[1].end(), std::back_inserter(common));
    std::int64_t student = 0, teacher = 0;
    for (const Span& span : spans) {
      ASSERT_EQ(span.student_first, student);
      ASSERT_EQ(span.teacher_first, teacher);
      student += span.student_count, teacher += span.teacher_count;
      ASSERT_EQ(ends[0][static_cast<std::size_t>(student - 1)], ends[1][static_cast<std::size_t>(teacher - 1)]);
      found.push_back(ends[0][static_cast<std::size_t>(student - 1)]);
    }
    ASSERT_EQ(found, common);
  }
}

TEST(Spelling, IsTheTextOfEveryGoldenRow) {
  for (const std::string name : {"byte_level_bpe", "sentencepiece_bpe"}) {
    const Side side(name);
    EXPECT_EQ(side.spelling->is_byte_level(), name == "byte_level_bpe");
    EXPECT_EQ(side.spelling->prefix(), name == "byte_level_bpe" ? Spelling::Prefix::kNone : Spelling::Prefix::kAlways);
    for (const Json& row : cases()[name]["rows"]) {
      const Numbers ids = row[1].get<Numbers>();
      bool has_special = false;
      for (const std::int64_t id : ids) has_special = has_special || side.spelling->is_special(static_cast<std::uint32_t>(id));
      if (has_special) continue;  // decoders join those with spaces of their own
      std::string text = side.spelt(ids);
      if (name == "sentencepiece_bpe" && text.starts_with(' ')) text.erase(0, 1);
      EXPECT_EQ(text, side.tokenizer.decode(std::vector<std::uint32_t>(ids.begin(), ids.end()), false)) << name << ": " << row[0];
    }
  }
  EXPECT_FALSE(Side("word_piece").spelling);
  EXPECT_FALSE(Side("word_level").spelling);
}

TEST(Translate, SpansHoldTheSameBytesOnBothSides) {
  const std::vector<std::string> names = {"byte_level_bpe", "sentencepiece_bpe", "unigram"};
  for (const std::string& from : names)
    for (const std::string& to : names) {
      const Side student(from), teacher(to);
      std::size_t num_spans = 0, num_several = 0;
      for (const Json& row : cases()["byte_level_bpe"]["rows"]) {
        const auto text = row[0].get<std::string>();
        const Numbers ids = student.ids(text);
        const Translation translation = translated(student, teacher, ids);
        // Where a normaliser changes the text, the two sides hold other bytes, and places are the tokenizer's word.
        std::string whole = student.spelt(ids), read = teacher.spelt(translation.ids);
        if (const std::string begin = "<s>"; read.starts_with(begin) && !whole.starts_with(begin)) read.erase(0, begin.size());
        const auto without_prefix = [](const Side& side, std::string spelt) { return side.spelling->prefix() != Spelling::Prefix::kNone && spelt.starts_with(' ') ? spelt.substr(1) : spelt; };
        if (without_prefix(student, whole) != without_prefix(teacher, read)) continue;
        std::int64_t student_end = 0, teacher_end = 0;
        for (const Span& span : translation.spans) {
          ASSERT_GE(span.student_first, student_end);
          ASSERT_GE(span.teacher_first, teacher_end);
          std::string ours = text_of(student, ids, span.student_first, span.student_count), theirs = text_of(teacher, translation.ids, span.teacher_first, span.teacher_count);
          if (&span == &translation.spans.front()) ours = without_prefix(student, ours), theirs = without_prefix(teacher, theirs);
          EXPECT_EQ(ours, theirs) << from << " to " << to << ": " << Json(text);
          student_end = span.student_first + span.student_count, teacher_end = span.teacher_first + span.teacher_count;
          num_spans += 1, num_several += span.student_count > 1 || span.teacher_count > 1;
        }
        // Nothing is lost: what both sides hold is in the spans up to the end.
        if (!without_prefix(student, whole).empty()) {
          EXPECT_EQ(student_end, static_cast<std::int64_t>(ids.size())) << from << " to " << to << ": " << Json(text);
        }
      }
      EXPECT_GT(num_spans, from == "unigram" || to == "unigram" ? 40u : 300u) << from << " to " << to;
      if (from != to && from != "unigram" && to != "unigram") {
        EXPECT_GT(num_several, 20u) << from << " to " << to;
      }
    }
}

TEST(Translate, TheSameTokenizerGivesEachTokenItself) {
  for (const std::string name : {"byte_level_bpe", "sentencepiece_bpe"}) {
    const Side side(name);
    const std::size_t before = 1;  // both add <s>
    for (const std::string text : {"Hello, world! the naïve café 😀 0x1F", "the quick  Hello", "the नमस्ते 2²"}) {
      const Numbers ids = side.ids(text);
      const Translation translation = translated(side, side, ids);
      EXPECT_EQ(Numbers(translation.ids.begin() + before, translation.ids.end()), ids) << name << ": " << text;
      ASSERT_EQ(translation.spans.size(), ids.size()) << name << ": " << text;
      for (std::size_t i = 0; i < ids.size(); ++i) EXPECT_EQ(translation.spans[i], (Span{static_cast<std::int64_t>(i), 1, static_cast<std::int64_t>(i + before), 1})) << name << ": " << text;
    }
  }
}

// A begin of two spaces, of which the first is the tokenizer's own.
TEST(Translate, TheTokenizersOwnSpaceIsNoText) {
  const Side side("sentencepiece_bpe");
  const Numbers ids = side.ids(" the");
  ASSERT_EQ(side.spelt(ids), "  the");
  const Translation translation = translated(side, side, ids);
  EXPECT_EQ(side.spelt(translation.ids), "<s>  the");  // and not three
  const Translation later = translated(side, side, ids, false);
  EXPECT_EQ(side.spelt(later.ids), "<s>   the");       // in the middle of a document both are text
}

// What broke an older alignment: a begin on one side only shifted all that followed.
TEST(Translate, ABeginOnOneSideChangesNoSpan) {
  const auto without_begin = [](Json& json) { json["post_processor"] = nullptr; };
  const std::string text = "Hello, the naïve café 😀 in the world";
  for (const std::string from : {"byte_level_bpe", "sentencepiece_bpe"}) {
    const std::string to = from == "byte_level_bpe" ? "sentencepiece_bpe" : "byte_level_bpe";
    const Side plain_student(from, without_begin), plain_teacher(to, without_begin), student(from), teacher(to);
    const Translation expected = translated(plain_student, plain_teacher, plain_student.ids(text));
    ASSERT_GT(expected.spans.size(), 8u);
    for (const bool ours : {false, true})
      for (const bool theirs : {false, true}) {
        Numbers ids = plain_student.ids(text);
        const std::int64_t begin = from == "byte_level_bpe" ? 0 : 1;
        if (ours) ids.insert(ids.begin(), begin);
        const Translation translation = translated(ours ? student : plain_student, theirs ? teacher : plain_teacher, ids);
        ASSERT_EQ(translation.ids.size(), expected.ids.size() + (theirs ? 1 : 0)) << from << ours << theirs;
        ASSERT_EQ(translation.spans.size(), expected.spans.size()) << from << ours << theirs;
        for (std::size_t i = 0; i < expected.spans.size(); ++i) {
          Span span = expected.spans[i];
          span.student_first += ours, span.teacher_first += theirs;
          EXPECT_EQ(translation.spans[i], span) << from << ours << theirs << " span " << i;
        }
      }
  }
}

TEST(Translate, SpecialTokensGoByNameOrByRole) {
  Side student("byte_level_bpe"), teacher("sentencepiece_bpe");
  student.model.eos_ids = {3}, student.model.bos_id = 0;  // <|im_end|>, which the teacher has not
  teacher.model.eos_ids = {2}, teacher.model.bos_id = 1;
  Numbers ids = student.ids("the café");
  const auto count = static_cast<std::int64_t>(ids.size());
  ids.push_back(3);
  for (const std::int64_t id : student.ids("in")) ids.push_back(id);
  const Translation translation = translated(student, teacher, ids);
  EXPECT_EQ(std::count(translation.ids.begin(), translation.ids.end(), 2), 1);
  const auto of_end = std::find_if(translation.spans.begin(), translation.spans.end(), [&](const Span& span) { return span.student_first == count; });
  ASSERT_NE(of_end, translation.spans.end());
  EXPECT_EQ(of_end->student_count, 1);
  EXPECT_EQ(of_end->teacher_count, 1);
  EXPECT_EQ(translation.ids[static_cast<std::size_t>(of_end->teacher_first)], 2);
  // One that the teacher has in no way is text to it.
  student.model.eos_ids = {};
  const Translation spelt = translated(student, teacher, ids);
  EXPECT_EQ(std::count(spelt.ids.begin(), spelt.ids.end(), 2), 0);
  EXPECT_NE(teacher.spelt(spelt.ids).find("<|im_end|>"), std::string::npos);
}

TEST(Translate, PartsOfACharacterAtTheEndsAreLeftOut) {
  const Side student("byte_level_bpe"), teacher("sentencepiece_bpe");
  Numbers ids;
  for (const char* byte : {"\u00f0", "\u0141", "\u013a", "\u0122"}) ids.push_back(student.tokenizer.id_of(byte).value());  // F0 9F 98 80
  ASSERT_EQ(student.spelt(ids), "😀");
  Numbers piece(ids.begin() + 2, ids.end());  // a character that began in the piece before
  for (const std::int64_t id : student.ids("the naïve")) piece.push_back(id);
  const std::size_t whole = piece.size();
  piece.insert(piece.end(), ids.begin(), ids.begin() + 3);  // and one that does not end
  const Translation translation = translated(student, teacher, piece, false);
  EXPECT_NE(teacher.spelt(translation.ids).find("the naïve"), std::string::npos);
  EXPECT_EQ(teacher.spelt(translation.ids).find('\xf0'), std::string::npos);
  ASSERT_FALSE(translation.spans.empty());
  EXPECT_GE(translation.spans.front().student_first, 2);
  EXPECT_EQ(translation.spans.back().student_first + translation.spans.back().student_count, static_cast<std::int64_t>(whole));
  // Bytes that are no text end what the teacher reads.
  Numbers broken = student.ids("the ");
  broken.insert(broken.end(), {ids[1], ids[1], ids[1], ids[1], ids[1]});
  for (const std::int64_t id : student.ids("naïve")) broken.push_back(id);
  EXPECT_EQ(teacher.spelt(translated(student, teacher, broken).ids).find("na"), std::string::npos);
}

TEST(Translate, NothingGivesNoSpan) {
  const Side student("byte_level_bpe"), teacher("sentencepiece_bpe");
  EXPECT_TRUE(translated(student, teacher, {}).spans.empty());
  EXPECT_TRUE(translated(student, teacher, {0}).spans.empty());  // <s>
  EXPECT_EQ(translated(student, teacher, {0}).ids, Numbers{1});
}

TEST(Translate, ATeacherWithoutSpellingGoesByItsPlaces) {
  const Side student("byte_level_bpe"), teacher("word_piece", {}, false);
  const std::string text = "the quick naïve in";
  const Numbers ids = student.ids(text);
  const Translation translation = translated(student, teacher, ids);
  EXPECT_GT(translation.spans.size(), 1u);
  const data::Encoding places = teacher.tokenizer.encode_with_offsets(text, false);
  std::int64_t before = static_cast<std::int64_t>(translation.ids.size() - places.ids.size());
  for (const Span& span : translation.spans) {
    const std::size_t ours = student.spelt({ids.begin(), ids.begin() + span.student_first + span.student_count}).size();
    EXPECT_EQ(ours, places.end_byte[static_cast<std::size_t>(span.teacher_first + span.teacher_count - 1 - before)]);
  }
}

TEST(Map, FindsAPermutationASubsetAndPadding) {
  Side student("byte_level_bpe"), same("byte_level_bpe");
  same.model.vocabulary_size += 100, student.model.vocabulary_size += 2;  // logits of no token
  const VocabularyMap map = map_exactly(student.tokens, same.tokens);
  EXPECT_EQ(map.student_size, 422);
  EXPECT_EQ(map.student_ids, map.teacher_ids);
  EXPECT_EQ(map.student_ids.size(), 422u);
  EXPECT_TRUE(map.teacher_alone.empty());

  const Side swapped("byte_level_bpe", [](Json& json) { std::swap(json["model"]["vocab"]["a"], json["model"]["vocab"]["b"]); });
  const VocabularyMap permuted = map_exactly(student.tokens, swapped.tokens);
  const auto a = static_cast<std::size_t>(*student.tokenizer.id_of("a"));
  EXPECT_EQ(permuted.teacher_of[a], *student.tokenizer.id_of("b"));
  EXPECT_EQ(permuted.student_ids.size(), 422u);

  Side cut("byte_level_bpe");  // a student whose model has fewer rows than its tokenizer tokens: the rest cannot be said
  cut.model.vocabulary_size = 300;
  EXPECT_EQ(map_exactly(cut.tokens, student.tokens).teacher_alone.size(), 122u);
  EXPECT_EQ(map_exactly(student.tokens, cut.tokens).teacher_of[350], -1);

  const Side other("sentencepiece_bpe");
  EXPECT_TRUE(fails_with(ErrorKind::kData, "tokens are in both", [&] { map_exactly(student.tokens, other.tokens); }));
}

TEST(Map, BySpellingSeesThroughTheConventions) {
  Side student("byte_level_bpe"), teacher("sentencepiece_bpe");
  student.model.eos_ids = {3}, teacher.model.eos_ids = {2};
  const VocabularyMap map = map_by_spelling(student.tokens, *student.spelling, teacher.tokens, *teacher.spelling);
  const auto teacher_of = [&](const char* name) { return map.teacher_of[static_cast<std::size_t>(student.tokenizer.id_of(name).value())]; };
  EXPECT_EQ(teacher_of("\u0120"), teacher.tokenizer.id_of("\u2581").value());
  EXPECT_EQ(teacher_of("\u00f0"), teacher.tokenizer.id_of("<0xF0>").value());
  EXPECT_EQ(teacher_of("a"), teacher.tokenizer.id_of("a").value());  // and not <0x61>
  EXPECT_EQ(teacher_of("<s>"), teacher.tokenizer.id_of("<s>").value());
  std::vector<std::int64_t> sorted = map.teacher_ids;
  std::sort(sorted.begin(), sorted.end());
  EXPECT_EQ(std::adjacent_find(sorted.begin(), sorted.end()), sorted.end());
  EXPECT_EQ(map.teacher_alone.size() + map.teacher_ids.size(), static_cast<std::size_t>(map.teacher_size));
  for (std::size_t i = 0; i < map.student_ids.size(); ++i) {
    const auto ours = static_cast<std::uint32_t>(map.student_ids[i]), theirs = static_cast<std::uint32_t>(map.teacher_ids[i]);
    if (!student.spelling->is_special(ours)) {
      EXPECT_EQ(student.spelling->bytes_of(ours), teacher.spelling->bytes_of(theirs));
    }
  }
}

}  // namespace
}  // namespace alambic::distill
