// Command release prepares a release of the published modules, and keeps the record of what
// they export. It is a module of its own, so that the root does not depend on its tools.
// Run it in its folder, as .ci/release and .ci/api do:
//
//	release prepare VERSION    edits the changelog and the go.mod files, prints what to do next
//	release api [-w]           compares the exported names with the record, or writes it
package main

import (
	"fmt"
	"os"
	"os/exec"
	"strings"
	"time"
)

// root is the folder of the root module.
const root = "../.."

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "release:", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	switch {
	case len(args) == 2 && args[0] == "prepare":
		return prepareHere(args[1])
	case len(args) == 1 && args[0] == "api":
		return checkFaces(root)
	case len(args) == 2 && args[0] == "api" && args[1] == "-w":
		return writeFaces(root)
	}
	return fmt.Errorf("got %q, want prepare VERSION, or api, or api -w", args)
}

// prepareHere prepares a release in the work tree and prints the commands that finish it.
func prepareHere(version string) error {
	changed, err := output(root, "git", "status", "--porcelain")
	if err != nil {
		return err
	}
	if changed != "" {
		return fmt.Errorf("the work tree has changes; commit or remove them:\n%s", changed)
	}
	tags, err := output(root, "git", "tag", "--list", "v*")
	if err != nil {
		return err
	}
	for tag := range strings.FieldsSeq(tags) {
		if err := later(version, tag); err != nil {
			return err
		}
	}
	if err := checkFaces(root); err != nil {
		return err
	}
	if err := prepare(root, version, time.Now()); err != nil {
		return err
	}
	fmt.Print(steps(version))
	return nil
}

// steps returns the commands that follow on prepare. The tags are in the order in which the
// modules require each other.
func steps(version string) string {
	var s strings.Builder
	fmt.Fprintf(&s, "# The files of %s are ready. Look at git diff, then run these commands.\n", version)
	fmt.Fprintf(&s, "git add --all\ngit commit -m 'release: %s'\n", version)
	tags := make([]string, len(published))
	for i, m := range published {
		tags[i] = m.tag(version)
		fmt.Fprintf(&s, "git tag %s\n", tags[i])
	}
	s.WriteString("# Between releases the nested modules use the tree.\n")
	s.WriteString("git checkout HEAD~ -- '*go.mod' '*go.sum'\ngit commit -m 'modules: use the tree again'\n")
	fmt.Fprintf(&s, "git push --atomic origin HEAD %s\n", strings.Join(tags, " "))
	return s.String()
}

// output runs a command in dir and returns what it prints, or an error with its messages.
func output(dir, name string, args ...string) (string, error) {
	return outputEnv(dir, nil, name, args...)
}

func outputEnv(dir string, env []string, name string, args ...string) (string, error) {
	cmd := exec.Command(name, args...)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), env...)
	var errs strings.Builder
	cmd.Stderr = &errs
	out, err := cmd.Output()
	if err != nil {
		return "", fmt.Errorf("%s %s: %w\n%s%s", name, strings.Join(args, " "), err, out, errs.String())
	}
	return string(out), nil
}
