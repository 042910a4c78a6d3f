// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <array>
#include <ostream>

#include "cli/verbs.h"
#include "core/config.h"
#include "core/error.h"
#include "distill/distill.h"
#include "parallel/launch_environment.h"
#include "parallel/local_ranks.h"
#include "train/recipe.h"
#include "train/train_config.h"

namespace alambic::cli {
namespace {

constexpr std::array<const char*, 2> kVerbsOfRanks = {"train", "distill"};

int run_launch(const Arguments& arguments, const Terminal& terminal) {
  const std::string& verb = arguments.positional(0);
  find_verb(verb);
  if (std::find(kVerbsOfRanks.begin(), kVerbsOfRanks.end(), verb) == kVerbsOfRanks.end())
    fail(ErrorKind::kUsage, "launch: ", verb, " works in one process; train and distill share their work among ranks", Remedy{"alambic " + verb + " ... without launch"});
  const parallel::LaunchEnvironment around = parallel::launch_environment();
  if (around.launcher != "none")
    fail(ErrorKind::kUsage, "launch: this is a rank already, of ", around.launcher, " (", around.variables, ")", Remedy{"leave alambic launch out under another launcher, or unset these variables"});

  parallel::LocalRanks ranks{.size = static_cast<int>(arguments.whole("ranks")), .command = {"/proc/self/exe"}, .again = {}, .restarts = static_cast<int>(arguments.whole("restarts"))};
  const std::vector<std::string>& words = arguments.positionals();
  ranks.command.insert(ranks.command.end(), words.begin(), words.end());
  // What is wrong with the command is said once, before any rank is started.
  const Arguments parsed = parse(find_verb(verb), std::span(words).subspan(1));
  if (parsed.has("help")) {
    terminal.out << help_of(find_verb(verb));
    return 0;
  }
  if (verb == "distill" && (parsed.has("cache") || parsed.has("generate")))
    fail(ErrorKind::kUsage, "launch: distill --cache and --generate work in one process", Remedy{"alambic distill ... without launch"});
  const std::string& config = parsed.positional(0);
  if (verb == "distill") {
    const auto distilled = read_config<distill::DistillConfig>(config, parsed.texts("set"));
    distill::check(distilled);
    train::Recipe recipe;
    recipe.verb = verb;
    train::require_sharing(distilled.train, recipe, ranks.size);
  } else {
    const auto trained = read_config<train::TrainConfig>(config, parsed.texts("set"));
    train::check(trained);
    train::require_sharing(trained, train::text_recipe(trained), ranks.size);
  }
  ranks.again = ranks.command;
  if (!parsed.has("resume")) ranks.again.push_back("--resume");
  return parallel::run_local_ranks(ranks, terminal.err);
}

}  // namespace

Verb launch_verb() {
  return {.name = "launch",
          .summary = "train or distill by several processes of this machine",
          .description = "Starts N ranks of VERB that share each step's micro-batches (data.batches_per_step must be a multiple of N). Their notes come on stderr, each line behind the rank's number; "
                         "the result comes on stdout as without launch. SIGTERM, SIGINT and SIGUSR1 go on to all ranks, which then save and end with exit code 75. When a rank dies, the others "
                         "end with exit code 7, and with --restarts all are started again from the last checkpoint. No rank outlives launch. Under torchrun, mpirun or srun it is not needed (docs/ranks.md). "
                         "The exit code is that of the rank that ended first for a reason of its own; 7 when one was lost.",
          .positionals = {{.name = "VERB", .help = "train or distill", .kind = Kind::kText, .choices = {"train", "distill"}},
                          {.name = "WORD...", .help = "what follows VERB: its arguments and options, as without launch", .kind = Kind::kText, .required = false}},
          .options = {{.name = "ranks", .kind = Kind::kWhole, .value = "N", .help = "how many processes; each computes with its share of the processor's cores unless OMP_NUM_THREADS or threads says otherwise", .low = 1, .high = 1024, .required = true, .letter = 'n'},
                      {.name = "restarts", .kind = Kind::kWhole, .value = "N", .help = "times that all ranks are started again with --resume after one was lost", .otherwise = "0", .low = 0, .high = 1e6}},
          .examples = {{"alambic launch -n 2 train run.yaml", "a run by two processes"},
                       {"alambic launch -n 4 --restarts 3 train run.yaml --set deterministic=true", "the same bits by four, which begin again when one dies"}},
          .run = run_launch,
          .takes_command = true};
}

}  // namespace alambic::cli
