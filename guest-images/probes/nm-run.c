// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * nm-run COMMAND...: runs a command between two marks, its output thrown
 * away, and prints {"ns": wall time, "status": exit status, "bytes": printed}.
 */
#include <stdio.h>
#include <sys/wait.h>

#include "mark.h"

int main(int argc, char **argv)
{
	char buffer[65536];
	uint64_t start, end, bytes = 0;
	int status, out[2];
	ssize_t n;
	pid_t child;

	if (argc < 2)
		errx(2, "usage: nm-run COMMAND [ARGUMENT]...");
	mark_open();
	if (pipe(out))
		err(1, "pipe");
	mark_begin();
	start = now_ns();
	child = fork();
	if (child < 0)
		err(1, "fork");
	if (!child) {
		dup2(out[1], 1);
		close(out[0]);
		close(out[1]);
		execvp(argv[1], argv + 1);
		err(127, "%s", argv[1]);
	}
	close(out[1]);
	while ((n = read(out[0], buffer, sizeof(buffer))) > 0)
		bytes += n;
	if (waitpid(child, &status, 0) < 0)
		err(1, "waitpid");
	end = now_ns();
	mark_end();
	printf("{\"ns\": %llu, \"status\": %d, \"bytes\": %llu}\n",
	       (unsigned long long)(end - start),
	       WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status),
	       (unsigned long long)bytes);
	return 0;
}
