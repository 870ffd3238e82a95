"""The command line: parse, one call, render. The only layer that prints, exits or reads the environment.

main                commands loaded on demand, one of them run, with its signals, errors and exit code
commands            one file for each command
views               tables and pictures
options             the options that several commands share; `conversion_options`, those of conversions
environment         the variables of the environment, and the files of settings
configured_command  a command whose options may also come from variables and a TOML file
registry_choice     the registry that a command uses; `remote_choice`, the remote; `catalogs`, whichever of both is asked
inputs              the adapter and the base that a command names
remotes             credentials for remotes; `logins`, the registry that a login is for
output              results on stdout and messages on stderr; `progress`, bars
errors              errors in the words of the command line; `explanations`, the reason of each code, as `explained_codes`
                    shows it
loop_hints          the command line that does for several adapters what a command does for one
suggestions         the word that a mistyped one probably means; `completions`, the words at TAB
ages                ages and times as options take them
version_results     the results of `push`, `pull` and others that store or write a version
merge_adapters      the two kinds of `merge`, with `merge_into`
data_evaluation     the kinds of `eval`, with `golden_tests`, `compared_tests` and `imported_results`
gate_options        `--gate` of `eval`; `signed_results`, its signature
signing_options     signers, keys and passphrases; `attachments`, what is attached to a version
engines             the engine that a command runs; `vllm_settings`, the variables of the plugin that vLLM loads
gc_report           what the commands that collect garbage share
locks               entries that commands add to a lock file
"""
