// SPDX-License-Identifier: Apache-2.0
#pragma once
// The verbs, one file each, and the options that several of them share.
#include <vector>

#include "cli/options.h"
#include "core/json.h"

namespace alambic::train {
struct TrainReport;
}

namespace alambic::cli {

Verb completion_verb();
Verb distill_verb();
Verb doctor_verb();
Verb evaluate_verb();
Verb export_verb();
Verb extend_verb();
Verb generate_verb();
Verb help_verb();
Verb import_verb();
Verb inspect_verb();
Verb launch_verb();
Verb man_verb();
Verb merge_verb();
Verb plan_verb();
Verb prepare_verb();
Verb prune_verb();
Verb score_verb();
Verb train_verb();

/// All of them in the order of the work, --help and --quiet added to each.
const std::vector<Verb>& verbs();
std::vector<std::string> verb_names();
/// Error(kUsage) with the nearest name.
const Verb& find_verb(const std::string& name);

Option json_option();
Option set_option();
Option threads_option();
/// Makes libtorch use --threads, where it was given.
void apply_threads(const Arguments& arguments);

/// What train and distill end with: the report itself with --json, else where the result is and its figures. Returns 0.
int print_run_report(const train::TrainReport& report, const Arguments& arguments, const Terminal& terminal);

/// One JSON object on a line of its own. Error(kBug) for a number that JSON cannot hold.
void print_json(const Terminal& terminal, const Json& object);

/// A line on stdout or stderr never contains control characters of somebody else's making: they become \xNN.
std::string printable(std::string_view text);

/// All of a stream (stdin), for "-". Error(kData) beyond max_bytes or when reading fails.
std::string read_all(std::istream& in, std::size_t max_bytes = 64u << 20);

/// What `alambic --help` prints: the verbs, in the order of the work.
std::string overview();
/// (code, meaning) pairs, for help and man page.
const std::vector<std::pair<int, std::string>>& exit_code_meanings();

}  // namespace alambic::cli
